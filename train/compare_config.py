"""What a comparison of projectors is made of. No torch here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt, StringConstraints, model_validator

from vlm_vision.adapters.config import ProjectorNode
from vlm_vision.config import Config
from vlm_vision.train.align_config import AlignConfig, Share

Label = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class QuestionsConfig(Config):
    """Held-out conversations in LLaVA's format, every question of which is asked by itself.

    Attributes:
        file, image_folder, max_bad_share: as in `ConversationConfig`.
        max_new_tokens: of an answer.
    """

    file: str
    image_folder: str | None = None
    max_bad_share: Share = 0.0
    max_new_tokens: PositiveInt = 16


class CompareConfig(AlignConfig):
    """One tower, one language model and one recipe, with several projectors between them.

    Attributes:
        projectors: by the label that plots and folders give them.
        questions: what the finished models are scored on.
        seeds: every projector is trained once with each; `seed` is not used.
        keep_models: keep the finished models; otherwise a run keeps its projector and figures.
    """

    projectors: Annotated[dict[Label, ProjectorNode], Field(min_length=1)]
    questions: QuestionsConfig
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    keep_models: bool = False

    @model_validator(mode="after")
    def _projectors_are_named_once(self) -> CompareConfig:
        given = {"projector", "projector_weights"} & self.model.model_fields_set
        if given:
            raise ValueError(f"model.{min(given)} has no meaning here: name it under `projectors`")
        if "seed" in self.model_fields_set:
            raise ValueError("seed has no meaning here: `seeds` lists them")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds name one twice")
        return self

    def run(self, label: str, seed: int, feature_cache: str) -> AlignConfig:
        """The alignment of one projector; stages that name no feature cache share one."""
        model = self.model.model_copy(update={"projector": self.projectors[label]})
        stages = [
            stage.model_copy(
                update={
                    "data": tuple(
                        source.model_copy(
                            update={"feature_cache": stage.sources[0].feature_cache or feature_cache}
                        )
                        for source in stage.sources
                    )
                }
            )
            for stage in self.stages
        ]
        return AlignConfig(model=model, stages=tuple(stages), seed=seed)
