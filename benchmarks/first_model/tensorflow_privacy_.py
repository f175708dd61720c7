import tensorflow as tf
import tensorflow_privacy as tfp
from digits import x, x_test, y, y_test
from dp_accounting import dp_event, mechanism_calibration, rdp

rate, steps = 128 / len(x), 30 * (len(x) // 128)
sigma = mechanism_calibration.calibrate_dp_mechanism(
    rdp.RdpAccountant,
    lambda z: dp_event.SelfComposedDpEvent(dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(z)), steps),
    3.0, 1e-4,
)  # fmt: skip
net = tfp.DPSequential(
    l2_norm_clip=1.0, noise_multiplier=sigma,
    layers=[tf.keras.layers.Dense(64, "relu", input_shape=(64,)), tf.keras.layers.Dense(10)],
)  # fmt: skip
loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
net.compile(tf.keras.optimizers.legacy.SGD(2.0), loss, metrics=["accuracy"])
rows = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x)).batch(128, drop_remainder=True)
net.fit(rows, epochs=30, verbose=0)
print(
    net.evaluate(x_test, y_test, verbose=0)[1],
    tfp.compute_dp_sgd_privacy_statement(len(x), 128, 30, sigma, 1e-4, False),
)
