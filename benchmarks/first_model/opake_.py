import opake.accounting as acc
import opake.dpsgd.accounting as dpsgd_acc
import torch
from digits import x, x_test, y, y_test
from opake.dpsgd.clipping import clipped_grad
from opake.dpsgd.noise import gaussian_noise
from opake.dpsgd.sampling import PoissonSampler
from opake.random import key
from torch import nn
from torch.func import functional_call

inputs, targets, seed = torch.tensor(x), torch.tensor(y), key(torch.seed() % 2**31)
rate, steps = 128 / len(x), 30 * len(x) // 128
net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
params = {name: value.detach() for name, value in net.named_parameters()}
found = acc.calibrate(
    acc.epsilon_budget(3.0, delta=1e-4),
    lambda sigma: dpsgd_acc.poisson(dpsgd_acc.gaussian(sigma), sample_rate=rate) * steps,
    param_min=0.5, param_max=10.0,
)  # fmt: skip
grad_fn, clip_state = clipped_grad(
    lambda params, x, y: nn.functional.cross_entropy(functional_call(net, params, (x,)), y),
    clipping_norm=1.0, batch_argnums=(1, 2), normalize_by=128,
)  # fmt: skip
noise_fn, noise_state = gaussian_noise(noise_multiplier=found.param, key=seed)
for batch in PoissonSampler(inputs, sample_rate=rate, n_steps=steps, key=seed):
    grads, clip_state = grad_fn(params, inputs[batch], targets[batch], state=clip_state)
    noisy, noise_state = noise_fn(grads, noise_state)
    params = {name: params[name] - 2.0 * noisy.pytree[name] for name in params}
scores = functional_call(net, params, (torch.tensor(x_test),))
print((scores.argmax(1) == torch.tensor(y_test)).float().mean().item(), found)
