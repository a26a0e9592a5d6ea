"""A residual stream: the parameters that write it, and those that read it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Written:
    """A parameter that is added to a stream, or whose outputs are.

    Attributes:
        path: of the parameter.
        dim: its dimension in which the stream's channels lie.
        scale: path of the parameter that multiplies it channel by channel on its way (LayerScale).
    """

    path: str
    dim: int
    scale: str | None = None


@dataclass(frozen=True)
class Reading:
    """A Linear or convolution that reads a stream, or several places of it side by side.

    Attributes:
        weight: path of its weight, with the channels that it reads in dimension 1.
        bias: path of the bias that can take up a constant input; None where it has none.
        norm: path of the norm that it reads the stream through.
        rows: the first and the end of its outputs that do; None for all.
    """

    weight: str
    bias: str | None
    norm: str | None
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Blocks:
    """A list of blocks that a stream runs through.

    Attributes:
        path: of the list.
        number: of its blocks.
    """

    path: str
    number: int


@dataclass(frozen=True)
class Stream:
    """The channels that residual additions tie together, with all that writes and reads them.

    Attributes:
        name: path of what writes it first.
        width: number of channels.
        centred: whether a norm that reads it subtracts the mean of the channels (LayerNorm), so
            that only rotations that leave the all-ones vector in place are free.
        written: the parameters that write it.
        norms: paths of the norms that read it.
        readings: the layers that read it, through one of the norms or as it is.
        keeps_biases: whether the norms' biases must stay in the norms, because something like
            padding stands between them and their readers.
        told: paths of attentions that are told, once channels are cut, how wide their heads are,
            since they take it from their input.
        whole: why channels can't be cut by a plan; empty where they can.
        blocks: the lists of blocks that it runs through: a model with more of them, or less, has
            another stream.

    Example:
        >>> import timm, torch, tp_amp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1).eval()
        >>> images = torch.randn(2, 3, 224, 224)
        >>> [rotated] = tp_amp.rotate(model, images[:1], [images])
        >>> rotated.stream.name, rotated.stream.width, rotated.stream.norms
        ('patch_embed.proj', 192, ('blocks.0.norm1', 'blocks.0.norm2', 'norm'))
    """

    name: str
    width: int
    centred: bool
    written: tuple[Written, ...]
    norms: tuple[str, ...]
    readings: tuple[Reading, ...]
    keeps_biases: bool = False
    told: tuple[str, ...] = ()
    whole: str = ""
    blocks: tuple[Blocks, ...] = ()

    @property
    def down(self) -> str:
        """The path that it has in a plan."""
        return self.name

    @property
    def up(self) -> tuple[str, ...]:
        """A stream is no layer's hidden width; see `written` and `readings`."""
        return ()

    inner = up
    first = 0
    unit_width = 1

    @property
    def units(self) -> str:
        """What its `width` counts."""
        return "channels of the stream"

    def channels_left(self, model: nn.Module) -> int:
        """How many channels it has in a model that may be cut."""
        first = self.written[0]
        return int(model.get_parameter(first.path).shape[first.dim])

    @property
    def scales(self) -> tuple[str, ...]:
        """Paths of the parameters that scale what is written."""
        return tuple(dict.fromkeys(w.scale for w in self.written if w.scale))

    @property
    def readers(self) -> tuple[str, ...]:
        """Paths of the layers that read it."""
        return tuple(dict.fromkeys(r.weight.rpartition(".")[0] for r in self.readings))

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of all parameters that hold the stream's channels, but for those of norms."""
        read = (reading.weight for reading in self.readings)
        return tuple(dict.fromkeys([*(w.path for w in self.written), *self.scales, *read]))
