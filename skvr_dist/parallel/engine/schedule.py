"""The order of a stage's instructions: DeepSpeed's schedules, with the sends of each step before everything else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from deepspeed.runtime.pipe.schedule import PipeInstruction, SendActivation, SendGrad


def sends_first(steps: Iterable[list[PipeInstruction]]) -> Iterator[list[PipeInstruction]]:
    """The steps of a DeepSpeed schedule, each of which starts to send what the step before it computed.

    DeepSpeed lets a stage wait for the gradients of one micro-batch before it sends the activations of another, because
    its sends block: of two neighbours one must receive first. Ours do not (`skvr_dist.parallel.pipeline.channel`), and
    what is ready need not wait.

    Nothing else changes. What a step sends was computed in an earlier one, and is packed into a tensor of its own
    before a receive of the same step can take its buffer. Instructions of one kind keep their order.
    """
    # Why no stages wait for each other in a circle. In DeepSpeed's schedules a tensor is sent in the step with the
    # same number in which the neighbour receives it, and a channel carries no two in one step.
    #
    # * A receive in step t waits for a send in step t, which its stage issues before anything else of that step.
    # * A send in step t waits for the last but one before it to be received, which the neighbour does in an earlier
    #   step.
    #
    # So whatever waits does so for something of an earlier step, or for a send of the same step, which waits for
    # earlier steps only.
    #
    # Nor does a receive that is posted one ahead hold up what it waits for, should it hold this stage (see
    # `Channel.expect`) while the neighbour continues. Take one posted in step t of a training schedule, for step t + 2:
    # the neighbour computes its tensor in step t + 1 and until then needs what this stage sends it in steps up to
    # t + 1. This stage sends to it in every other step only, like step t, and in step t before the receive was posted.
    # An evaluation's tensors only come from earlier stages. Where some passes have no gradients, nothing is received
    # ahead: the next ones may be several steps off, and until then the neighbour needs more of what this stage sends.
    for step in steps:
        yield sorted(step, key=lambda instruction: not isinstance(instruction, SendActivation | SendGrad))
