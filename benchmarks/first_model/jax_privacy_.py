import os

os.environ["KERAS_BACKEND"] = "jax"
import keras
from digits import x, x_test, y, y_test
from jax_privacy import keras_api

steps = 30 * len(x) // 128
config = keras_api.DPKerasConfig(
    epsilon=3.0, delta=1e-4, clipping_norm=1.0, batch_size=128, gradient_accumulation_steps=1, train_steps=steps,
    train_size=len(x), poisson_sampling_in_fit=True,
)  # fmt: skip
net = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(10)])
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
net = keras_api.make_private(net, config)
net.compile(keras.optimizers.SGD(2.0), loss, metrics=["accuracy"])
net.fit(x, y, batch_size=128, epochs=30, verbose=0)
print(net.evaluate(x_test, y_test, verbose=0)[1], config.epsilon)
