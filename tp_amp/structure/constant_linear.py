"""A Linear that reads no channel any more, and gives its bias."""

from __future__ import annotations

from torch import Tensor, nn


class ConstantLinear(nn.Linear):
    """A Linear without inputs: its bias at every place, without the layers before it.

    PyTorch's own gives the same, by a product of empty matrices; but OpenVINO reads no such
    product and onnxruntime no norm over no channels, which exporters leave out where nothing reads
    them. In training the empty product stays, so that the layers before it have gradients.
    """

    def forward(self, values: Tensor) -> Tensor:
        """Give the bias at each place of `(..., 0)`."""
        if self.training:
            return super().forward(values)
        bias = self.weight.new_zeros(self.out_features) if self.bias is None else self.bias
        # A copy, since whoever reads it may change it in place.
        return bias.to(values.dtype).expand(*values.shape[:-1], self.out_features).clone()
