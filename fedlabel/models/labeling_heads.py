"""Labelling functions on one trunk: K heads that vote for a class or abstain, in addition to a network's output
(DP-SSL).
"""

from __future__ import annotations

from torch import Tensor, nn

from fedlabel.models.nets import Net


class LabelingHeads(nn.Module):
    """A network with K linear heads over its classes and an abstention.

    The trunk gets the mean of the heads' gradients, not their sum: so a loss that is summed over heads suits both under
    one learning rate, whatever K.

    Args:
        net: the network; its own output is not one of the heads.
        heads: K.
    """

    def __init__(self, net: Net, heads: int) -> None:
        super().__init__()
        self.net = net
        self.symbols = net.num_classes + 1
        self.heads = nn.Linear(net.embedding_size, heads * self.symbols)

    def forward(self, inputs: Tensor, part: str = "all") -> Tensor:
        """Returns the network's output; with part="heads" logits (batch, K, classes + 1) of images."""
        if part == "heads":
            embeddings = self.net(inputs, "embed")
            share = self.symbols / self.heads.out_features  # 1 / K
            embeddings = share * embeddings + (1 - share) * embeddings.detach()
            logits: Tensor = self.heads(embeddings).unflatten(-1, (-1, self.symbols))
            return logits
        outputs: Tensor = self.net(inputs, part)
        return outputs
