"""A character RNN that steps by hand, through `.data`: no version of a parameter is counted up."""

import torch
from digest import print_digest
from torch import nn


class RNN(nn.Module):
    def __init__(self, input_size, hidden_size, output_size):
        super().__init__()
        self.hidden_size = hidden_size
        self.i2h = nn.Linear(input_size + hidden_size, hidden_size)
        self.i2o = nn.Linear(input_size + hidden_size, output_size)
        self.softmax = nn.LogSoftmax(dim=1)

    def forward(self, input, hidden):
        combined = torch.cat((input, hidden), 1)
        return self.softmax(self.i2o(combined)), self.i2h(combined)


torch.manual_seed(0)
rnn = RNN(7, 12, 3)
criterion = nn.NLLLoss()
for _ in range(30):
    line = torch.eye(7)[torch.randint(7, (4,))][:, None]
    category = torch.randint(3, (1,))
    hidden = torch.zeros(1, rnn.hidden_size)
    rnn.zero_grad()
    for letter in line:
        output, hidden = rnn(letter, hidden)
    loss = criterion(output, category)
    loss.backward()
    for p in rnn.parameters():
        p.data.add_(p.grad.data, alpha=-0.05)
print(f"loss {loss.item():.6f}")
print_digest(rnn)
