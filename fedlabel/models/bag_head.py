"""A second output of a network: class shares of a bag from the mean of its samples' embeddings (LLP-BP)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fedlabel.models.nets import Net


class BagHead(nn.Module):
    """A network with two more linear layers, applied to means of embeddings.

    Args:
        net: the network.
        hidden: width of the hidden one of the two layers.
    """

    def __init__(self, net: Net, hidden: int) -> None:
        super().__init__()
        self.net = net
        self.bag_hidden = nn.Linear(net.embedding_size, hidden)
        self.bag_output = nn.Linear(hidden, net.num_classes)

    def forward(self, inputs: Tensor, part: str = "all") -> Tensor:
        """Returns the network's output; with part="bags" logits (bags, classes) of means (bags, features)."""
        if part == "bags":
            logits: Tensor = self.bag_output(F.relu(self.bag_hidden(inputs)))
            return logits
        outputs: Tensor = self.net(inputs, part)
        return outputs
