"""What the representation stage minimises: ITC, ITM and ITG of a batch that ranks share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vlm_vision.errors import DataError
from vlm_vision.train.losses import gather_rows
from vlm_vision.train.representation import RepresentationModel, similarities
from vlm_vision.train.representation_config import ObjectiveConfig


@dataclass(frozen=True)
class Outcome:
    """What a step's pairs of this rank gave.

    Attributes:
        total: the weighted sum, whose mean over ranks is the loss of the whole batch.
        itc, itm, itg: not weighted.
        itc_accuracy: share of pictures whose nearest caption of all ranks is right.
        itm_accuracy: share of the 3B pairs that were told right, of which a third match.
        finite: for each pair, whether its embeddings are.
    """

    total: Float[Tensor, ""]
    itc: Float[Tensor, ""]
    itm: Float[Tensor, ""]
    itg: Float[Tensor, ""]
    itc_accuracy: Float[Tensor, ""]
    itm_accuracy: Float[Tensor, ""]
    finite: Bool[Tensor, " b"]


class RepresentationObjective(nn.Module):
    """ITC, ITM and ITG of a batch that ranks share.

    Equals the losses of LAVIS (`blip2_models/blip2_qformer.py`, `Blip2Qformer.forward`), with three
    differences: gradients of ITC reach the embeddings of other ranks too, and ITG is a mean over the tokens
    of the whole batch, so that ranks compute what one process would; and pairs that say the same share the
    target of ITC and are no negatives of ITM, as LAVIS does where it knows which captions share a picture.
    """

    def __init__(self, model: RepresentationModel, config: ObjectiveConfig) -> None:
        super().__init__()
        self.model, self.config = model, config

    def forward(
        self,
        patches: Float[Tensor, "b n d"],
        ids: Int[Tensor, "b t"],
        identities: Int[Tensor, "b k"],
        noise: Float[Tensor, "2 b B"],
    ) -> Outcome:
        """Losses of this rank's pairs.

        Args:
            patches, ids: of pictures and of their captions, one of each; padding is as long on all ranks.
            identities: pairs that agree in any of the k columns say the same.
            noise: of Gumbel's distribution, by which a caption that does not fit is drawn for each picture,
                and a picture for each caption; columns are the pairs of all ranks, as `whole_batch` has them.

        Raises:
            DataError: all pairs of the batch say the same as one of them.
        """
        model, config = self.model, self.config
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        everyone = whole_batch(identities)
        is_same = (everyone[:, None] == everyone).any(dim=-1)
        if bool(is_same.all(dim=1).any()):
            raise DataError("all pairs of a batch say the same as one of them: raise batch_size")
        is_same = is_same[rank::world]
        all_ids = whole_batch(ids)
        longest = int(model.is_text(all_ids).any(dim=0).sum())
        ids, all_ids = ids[:, :longest], all_ids[:, :longest]

        # Queries see no text, so what they are does not depend on the one that is to be written.
        to_write = torch.cat([torch.full_like(ids[:, :1], model.tokenizer.dec_id), ids[:, 1:]], dim=1)
        queries, written = model.write(patches, to_write)
        images, texts = model.embed_queries(queries), model.embed_texts(ids)
        scale = model.logit_scale.exp()
        to_text = scale * similarities(images, whole_batch(texts))
        to_image = scale * similarities(whole_batch(images), texts).T
        targets = is_same / is_same.sum(dim=1, keepdim=True)
        smooth = config.label_smoothing
        itc = (
            cross_entropy(to_text, targets, label_smoothing=smooth)
            + cross_entropy(to_image, targets, label_smoothing=smooth)
        ) / 2

        # The largest of scores plus Gumbel's noise is drawn by the scores' softmax.
        wrong_text, wrong_image = (
            (scores.detach().masked_fill(is_same, -torch.inf) + gumbel).argmax(dim=1)
            for scores, gumbel in zip((to_text, to_image), noise, strict=True)
        )
        matches = model.match(
            torch.cat([patches, whole_batch(patches)[wrong_image], patches]),
            torch.cat([ids, ids, all_ids[wrong_text]]),
        )
        is_match = (torch.arange(len(matches), device=ids.device) < len(ids)).long()
        itm = cross_entropy(matches, is_match)

        labels = ids[:, 1:]
        learnt = model.is_text(labels)
        words = model.words(written[:, :-1][learnt])
        count = int(model.is_text(all_ids[:, 1:]).sum()) / world
        itg = cross_entropy(words.float(), labels[learnt], reduction="sum", label_smoothing=smooth) / count
        return Outcome(
            total=config.itc * itc + config.itm * itm + config.itg * itg,
            itc=itc.detach(),
            itm=itm.detach(),
            itg=itg.detach(),
            itc_accuracy=is_same.gather(1, to_text.argmax(dim=1, keepdim=True)).float().mean(),
            itm_accuracy=(matches.argmax(dim=1) == is_match).float().mean(),
            finite=images.isfinite().all(dim=2).all(dim=1) & texts.isfinite().all(dim=1),
        )


def whole_batch(rows: Shaped[Tensor, "b ..."]) -> Shaped[Tensor, "B ..."]:
    """Rows of all ranks in the order in which the batch was dealt to them, the same for any number of ranks.

    Gradients come back to the rank that a row is from, summed over what all ranks say of it.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    dealt: Tensor = rearrange(gather_rows(rows), "(w b) ... -> (b w) ...", w=world)
    return dealt


def gumbel_noise(pairs: int, seed: int, step: int) -> Float[Tensor, "2 n n"]:
    """Noise for the draws of wrong captions and wrong pictures at a step, for all pairs of a batch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    uniform = torch.rand(2, pairs, pairs, generator=generator).clamp(min=torch.finfo(torch.float32).tiny)
    return -(-uniform.log()).log()
