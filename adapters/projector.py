"""What every projector is: a module [B,N,D] -> [B,M,L] that knows its config, widths and grid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from vlm_vision.adapters.config import Grid, ProjectorConfig


class Projector(nn.Module):
    """Base of projectors. Comes first among the bases of a class that is also a ready-made torch module.

    Attributes:
        config: the config it was built from.
        in_features, out_features: widths D of a patch and L of a token.
        grid: patches of one picture as (rows, columns).
    """

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

    def tokens_out(self, grid: Grid | None = None) -> int:
        """Tokens M of a picture of `grid` patches; of this projector's own grid by default."""
        return self.config.tokens_out(grid or self.grid)
