from digits import x, x_test, y, y_test
from torch import nn

from clipless_dp import DPLipModel, evaluate, fit, gradient_gated, losses

net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
model = DPLipModel(gradient_gated(net), input_shape=(64,), input_norm=4.0, loss=losses.TauCrossEntropy(8.0))
result = fit(model, (x, y), epsilon=3.0, delta=1e-4)
print(evaluate(model, (x_test, y_test))[0], result.epsilon)
