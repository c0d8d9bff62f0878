"""What every projector is: a module [B,N,D] -> [B,M,L] that knows its config, widths and grid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from vlm_vision.errors import ConfigError

if TYPE_CHECKING:
    from vlm_vision.adapters.config import Grid, ProjectorConfig


class Projector(nn.Module):
    """Base of projectors: `projector(patches)`, or `projector(patches, grid)` for pictures of another grid.

    Tiles are pictures of their own: a tiled picture comes as its tiles along B, and is put together after
    (`vlm_vision.tiling`). Comes first among the bases of a class that is also a ready-made torch module.

    Attributes:
        config: the config it was built from.
        in_features, out_features: widths D of a patch and L of a token.
        grid: patches of one picture as (rows, columns).
        reads_text: whether a picture's instruction goes in too, as `text_ids` and `text_mask`, both [B,T].
        output_layer: the layer whose width is the language model's, where training that knows no language
            model leaves it to be made; None where there is no such training.
    """

    reads_text: bool = False
    output_layer: ClassVar[str | None] = None
    config: ProjectorConfig
    in_features: int
    out_features: int
    grid: Grid

    def __init__(
        self, config: ProjectorConfig, in_features: int, out_features: int, grid: Grid, *arguments: Any
    ) -> None:
        super().__init__(*arguments)
        self.config, self.grid = config, grid
        self.in_features, self.out_features = in_features, out_features

    def grid_out(self, grid: Grid | None = None) -> Grid:
        """Rows and columns of the tokens of a picture of `grid` patches; of its own grid by default."""
        return self.config.grid_out(grid or self.grid)

    def tokens_out(self, grid: Grid | None = None) -> int:
        """Tokens M of a picture of `grid` patches; of this projector's own grid by default."""
        return self.config.tokens_out(grid or self.grid)

    def grid_of(self, patches: Float[Tensor, "b n d"], grid: Grid | None) -> Grid:
        """The grid that patches lie on: the one given, or its own.

        Raises:
            ConfigError: they are not that many, or a grid that this projector cannot take.
        """
        rows, columns = grid or self.grid
        if patches.shape[1] != rows * columns:
            raise ConfigError(
                f"{self.config.name}: {patches.shape[1]} patches do not lie on a grid of {rows}x{columns}; "
                "give the grid they have: projector(patches, (rows, columns))"
            )
        self.config.grid_out((rows, columns))
        return rows, columns

    def like_weights(self, patches: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Patches in the dtype and on the device of its weights, where it has any."""
        weights = next(self.parameters(), None)
        return patches if weights is None else patches.to(weights)
