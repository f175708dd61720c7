import torch
from digits import x, x_test, y, y_test
from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

loader = DataLoader(TensorDataset(torch.tensor(x), torch.tensor(y)), batch_size=128)
net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(net.parameters(), lr=2.0)
engine = PrivacyEngine(accountant="prv")
net, optimizer, loader = engine.make_private_with_epsilon(
    module=net, optimizer=optimizer, data_loader=loader, target_epsilon=3.0, target_delta=1e-4, epochs=30,
    max_grad_norm=1.0,
)  # fmt: skip
for _ in range(30):
    for inputs, targets in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), targets).backward()
        optimizer.step()
accuracy = (net(torch.tensor(x_test)).argmax(1) == torch.tensor(y_test)).float().mean().item()
print(accuracy, engine.get_epsilon(1e-4))
