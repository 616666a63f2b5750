"""What every rank counts in a step and the run reports as a whole: summed in one vector, with the loss."""

from __future__ import annotations

from dataclasses import dataclass

from skvr_dist.checkpoint.saver import Saver
from skvr_dist.cluster.interrupt import InterruptListener
from skvr_dist.parallel.engine.engine import RoutedPipelineEngine
from skvr_dist.train.batches import WatchedBatches
from skvr_dist.train.writers import Values


@dataclass
class StepCounts:
    """Counts of one rank's steps; the engine asks for `mine` at the end of each, and sums it over all ranks."""

    engine: RoutedPipelineEngine
    batches: WatchedBatches
    interrupts: InterruptListener
    saver: Saver
    _sent_before: int = 0
    _pairs_before: int = 0

    def __post_init__(self) -> None:
        self.engine.counts_to_sum = self.mine

    def begin_step(self) -> None:
        """Count from here on."""
        self._sent_before, self._pairs_before = self.engine.sent_bytes, self.batches.document_pairs

    def mine(self) -> list[float]:
        """Bytes sent over each boundary in this step, labels lost to damage since the start, pairs of positions
        of the same document in this step, whether a save has failed, signals received."""
        mesh = self.engine.mesh
        sent = [0.0] * (mesh.pp_size - 1)
        if mesh.pp_rank < mesh.pp_size - 1:
            sent[mesh.pp_rank] = float(self.engine.sent_bytes - self._sent_before)
        stands_for_replica = self.engine.is_first_stage() and mesh.tp_rank == 0
        lost = self.batches.lost_tokens if stands_for_replica else 0
        pairs = self.batches.document_pairs - self._pairs_before if stands_for_replica else 0
        return [*sent, float(lost), float(pairs), float(self.saver.has_failed), *self.interrupts.flags()]

    def values(self, *, skips_damage: bool) -> Values:
        """What the last step's sums are reported as.

        Args:
            skips_damage: whether damaged data is left out, so that labels can be lost.
        """
        boundaries = self.engine.mesh.pp_size - 1
        *sent, lost = self.engine.summed_counts[: boundaries + 1]
        found = {f"pipeline/crossing_bytes/boundary_{boundary}": count for boundary, count in enumerate(sent)}
        return found | ({"data/skipped_tokens": lost} if skips_damage else {})

    @property
    def document_pairs(self) -> float:
        """Pairs of positions of the same document in the last step's global batch; 0 if documents are not separate."""
        return self.engine.summed_counts[self.engine.mesh.pp_size]

    @property
    def save_failed(self) -> bool:
        """Whether the save that was under way had failed on any rank at the end of the last step."""
        return self.engine.summed_counts[self.engine.mesh.pp_size + 1] > 0

    def interrupted(self) -> str | None:
        """The signals that any rank had received at the end of the last step, in words."""
        return self.interrupts.in_words(self.engine.summed_counts[self.engine.mesh.pp_size + 2 :])
