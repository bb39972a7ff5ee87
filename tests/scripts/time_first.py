"""A word-language model: its inputs are [time, batch], 35 steps of 20 sequences."""

import torch
from digest import print_digest
from torch import nn


class LM(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.rnn = nn.LSTM(16, 16)
        self.decoder = nn.Linear(16, 50)

    def forward(self, words):
        return self.decoder(self.rnn(self.embedding(words))[0])


torch.manual_seed(0)
model = LM()
optimizer = torch.optim.Adam(model.parameters(), 1e-3)
for _ in range(4):
    words = torch.randint(50, (36, 20))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(words[:-1]).flatten(0, 1), words[1:].flatten()).backward()
    optimizer.step()
print_digest(model)
