"""The routed pipeline engine: DeepSpeed's PipelineEngine with routed stages and packed boundaries.

Kept from DeepSpeed: the 1F1B schedule, gradient reduction, ZeRO, mixed precision, the optimizer step. Replaced: what a
stage computes, what crosses between stages, and the order of a step's instructions: sends come first.
Sizes come from the routing plan, so there is no handshake; a stage's backward runs once per micro-batch, whatever
crosses. The loss and its gradient are means over the labels of the global batch, not over its micro-batches: DeepSpeed
averages the micro-batches' sums over equally many positions, and before the optimizer step everything is
multiplied by positions / labels, which is 1 if no label is ignored.

A micro-batch may have several passes (`skvr_dist.parallel.pipeline.passes`), which DeepSpeed's schedule takes for as
many micro-batches. Their labels count once, so that the same factor makes the mean of their weighted losses of it. What
runs forwards only is left out of the schedule on its way back, on every stage alike.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import MethodType
from typing import Any

import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import TRAIN_BATCH_TIMER, PipelineEngine
from torch import Tensor
from torch.profiler import record_function

from skvr_dist.config.model import ModelConfig
from skvr_dist.data.batch import MicroBatch
from skvr_dist.model.attention_choice import resolve
from skvr_dist.model.devices import to_device
from skvr_dist.model.documents import Documents
from skvr_dist.model.modules import count_labels
from skvr_dist.parallel.engine.distillation import Distillation
from skvr_dist.parallel.engine.gradients import (
    add_gradients_in_one_pass,
    clip_by_global_norm,
    drop_gradients,
    gradient_tensors,
    numbers_of,
    scale_gradients,
    sum_partial_gradients,
)
from skvr_dist.parallel.engine.muon import import_muon_uncompiled
from skvr_dist.parallel.engine.norms import known_global_norm, take_global_norm
from skvr_dist.parallel.engine.schedule import sends_first
from skvr_dist.parallel.engine.stage import Prediction, StageModule
from skvr_dist.parallel.engine.stopwatch import Stopwatch
from skvr_dist.parallel.engine.zero import ZeroPipelineEngine, compare_module_order_within, reduce_layer_by_layer
from skvr_dist.parallel.failure import naming_the_operation
from skvr_dist.parallel.guard import UpdateGuard
from skvr_dist.parallel.mesh import Mesh
from skvr_dist.parallel.pipeline.boundary import Handover, HandoverFormat, MicroBatchShape, connect
from skvr_dist.parallel.pipeline.step_plan import PassPlan, plan_for_stage
from skvr_dist.routing import RoutingPlan, fixed_plan


class RoutedPipelineEngine(ZeroPipelineEngine):
    """Trains and evaluates a decoder over pipeline stages, tensor-parallel ranks and data-parallel replicas.

    Args:
        module: this rank's stage.
        mesh: this rank's coordinates and groups.
        separate_documents: attention stays within documents, so that every stage reads the micro-batches.
        guard: decides which updates are applied.
        sequence_length: tokens per sequence; with the micro-batch size it fixes every shape that crosses.
        deepspeed_json: DeepSpeed's configuration.
        optimizer: builds the optimizer from parameter groups.
        lr_scheduler: builds the learning-rate schedule from the optimizer.
        distillation: what micro-batches learn from besides their labels, if anything.
    """

    sent_bytes = 0
    """Bytes of activations that this rank has sent to the next stage since it started."""
    backward_passes = 0
    """Backward passes that this stage has run since it started."""
    predicted_tokens = 0
    """Labels that counted in the last step or evaluation, over the global batch."""
    before_update: Callable[[], None] | None = None
    """Called in every step when its gradients are complete and not yet clipped."""
    _mean_loss = 0.0
    _own_loss: float | None = None  # of the micro-batches that this rank has run, on the last stage
    _own_parts: Sequence[float] = ()  # sum and labels of each part of it, if it distils
    _labels = 0  # of the micro-batches that this rank has run, on the last stage
    _update_is_admitted = True
    _plans: tuple[PassPlan, ...] = ()
    _arrived = 0  # passes that have come to this stage in the schedule that runs
    _loaded = 0  # passes whose micro-batch this stage has loaded
    _run_back = 0  # backward passes of the step
    _gradients: Handover | None = None
    total_loss: Tensor | None = None

    def __init__(
        self,
        module: StageModule,
        mesh: Mesh,
        *,
        guard: UpdateGuard,
        sequence_length: int,
        deepspeed_json: dict[str, Any],
        optimizer: Callable[[Any], torch.optim.Optimizer],
        lr_scheduler: Callable[[torch.optim.Optimizer], Any],
        separate_documents: bool = False,
        distillation: Distillation | None = None,
    ) -> None:
        compare_module_order_within(f"{mesh.pp_rank}/{mesh.tp_rank}")
        import_muon_uncompiled()
        super().__init__(
            args=None,
            model=module,
            optimizer=optimizer,
            model_parameters=parameter_groups(module),
            lr_scheduler=lr_scheduler,
            mpu=module.mpu(),
            dist_init_required=False,
            config=deepspeed_json,
            config_class=DeepSpeedConfig(deepspeed_json, module.mpu()),
        )
        if self.zero_optimization_stage() == 2:
            reduce_layer_by_layer(self.optimizer, module.decoder.layers.values())
        add_gradients_in_one_pass(self.optimizer)
        module.compile_layers(torch.device(self.device))
        self.separate_documents = separate_documents
        self.pipe_buffers["documents"] = [None] * self.num_pipe_buffers
        self.pipe_buffers["micro_batch"] = [None] * self.num_pipe_buffers  # number of the micro-batch in each buffer
        self.mesh = mesh
        self.guard = guard
        self.stage = module
        self.stopwatch = Stopwatch()  # of this rank's own part of each step
        self.counts_to_sum: Callable[[], list[float]] = list
        """Called at the end of every step, before its update: numbers to be summed over all ranks with its loss."""
        self.summed_counts: list[float] = []
        """Their sums in the last step."""
        self.losses_by_part: dict[str, float] = {}
        """Means of the parts of the last step's loss over the labels concerned, if it distilled (`PARTS`)."""
        self._distillation = distillation or Distillation()
        dtype = torch.bfloat16 if self.bfloat16_enabled() else torch.float32
        model = module.model_config
        self.attention = resolve(model.attention, torch.device(self.device), dtype, model.head_dim)
        """What attention is computed with here."""
        self._shape = MicroBatchShape(self.micro_batch_size, sequence_length, module.sequence_parallel)
        self._format = HandoverFormat(module.model_config, mesh, self._shape)
        with naming_the_operation(mesh, "connecting the pipeline stages"):
            self.before, self.after = connect(mesh, dtype, self.device)

    def train_step(self, micro_batches: Iterator[MicroBatch], plan: RoutingPlan) -> float:
        """One optimizer step.

        Args:
            micro_batches: this replica's micro-batches; read on the first and last stage, and on all of them where
                documents are separate.
            plan: the donors of all global micro-batches of the step.

        Returns:
            the mean loss over the labels of the global batch, in nats per token, on every rank; not a number if all
            are ignored.
        """
        passes = self._distillation.of_step(self.global_steps, plan.num_micro_batches)
        count = sum(map(len, passes))
        if len(passes) != plan.num_micro_batches or count != self.micro_batches * self.mesh.dp_size:
            raise ValueError(
                f"the plan has {plan.num_micro_batches} micro-batches with {count} passes, the step "
                f"{self.micro_batches} passes on each of {self.mesh.dp_size} replicas"
            )
        self._plans = plan_for_stage(plan, self.mesh, self.stage.start, self.stage.stop, passes)
        self.stopwatch.clear()  # evaluations run the same instructions
        self.timers(TRAIN_BATCH_TIMER).reset()  # DeepSpeed empties it only when it prints
        with naming_the_operation(self.mesh, "the training step"):
            return float(self.train_batch(_repeated(micro_batches, self._plans)))

    def evaluate(self, micro_batches: Sequence[MicroBatch], donors: Iterable[int]) -> float:
        """Mean loss over the labels of every replica's micro-batches, with the same donors in all of them.

        Args:
            micro_batches: equally many on each replica.
        """
        plan = fixed_plan(tuple(donors), len(micro_batches) * self.mesh.dp_size)
        self._plans = plan_for_stage(plan, self.mesh, self.stage.start, self.stage.stop)
        with naming_the_operation(self.mesh, "the evaluation"):
            return float(self.eval_batch(iter(micro_batches), num_micro_batches=len(micro_batches)))

    @property
    def gradient_norm(self) -> float:
        """Global gradient norm of the last step, before clipping; not a number if its update was skipped."""
        return float(self.get_global_grad_norm() or 0.0)

    @property
    def teacher_model(self) -> ModelConfig | None:
        """The shape of the frozen model that passes run through; None if the model is its own teacher, or has none."""
        teacher = self._distillation.teacher
        return teacher.model_config if teacher else None

    def _exec_schedule(self, pipe_schedule: schedule.PipeSchedule) -> None:
        self._reserve_pipe_buffers(pipe_schedule.num_pipe_buffers())
        self.fwd_outputs: list[Tensor] = []
        self._labels = self._arrived = self._loaded = self._run_back = 0
        self._expect_tensors(training=isinstance(pipe_schedule, schedule.TrainSchedule))
        for instructions in sends_first(pipe_schedule):
            for instruction in instructions:
                kind, number = type(instruction), self._pass_of(instruction)
                if kind in _ON_THE_WAY_BACK and number is not None and not self._plans[number].run.runs_back:
                    continue
                name = kind.__name__ if number is None else f"{kind.__name__} {number}"
                with (
                    naming_the_operation(self.mesh, kind.__name__, number),
                    self.stopwatch.watching(kind),
                    record_function(name),  # for `skvr-profile`
                ):
                    MethodType(self._INSTRUCTION_MAP[kind], self)(**instruction.kwargs)
        self._distillation.forget()
        if self.before:
            self.before.gradients.finish_sends()
        if self.after:
            self.after.activations.finish_sends()

    def _pass_of(self, instruction: schedule.PipeInstruction) -> int | None:
        """The number of the pass that an instruction is for, from 0; None if it is for the whole step.

        A pass gets its number where it comes to this stage: loaded on the first one, received on the others. The
        number then lies beside it in its buffer.
        """
        if not isinstance(instruction, schedule.BufferOpInstruction):
            return None
        buffer_id = instruction.kwargs["buffer_id"]
        arrives = schedule.LoadMicroBatch if self.is_first_stage() else schedule.RecvActivation
        if isinstance(instruction, arrives):
            self.pipe_buffers["micro_batch"][buffer_id] = self._arrived
            self._arrived += 1
        elif isinstance(instruction, schedule.LoadMicroBatch):
            return None  # labels of the last stage, which some schedules load before the pass arrives
        return self.pipe_buffers["micro_batch"][buffer_id]

    def _plan_of(self, buffer_id: int) -> PassPlan:
        """The pass in a buffer."""
        return self._plans[self.pipe_buffers["micro_batch"][buffer_id]]

    def _expect_tensors(self, training: bool) -> None:
        """Tell the channels what this schedule will bring; its sizes follow from the plan."""
        if self.before:
            self.before.activations.expect([self._format_of(plan).elements(plan.entering) for plan in self._plans])
        if self.after and training:
            back = [plan for plan in self._plans if plan.run.runs_back]
            sizes = [self._format_of(plan).elements(plan.leaving) for plan in back]
            # Where some passes do not come back, the next gradients may be far off: see `sends_first`.
            self.after.gradients.expect(sizes, ahead=len(back) == len(self._plans))

    def _format_of(self, plan: PassPlan) -> HandoverFormat:
        """How what crosses in a pass is packed."""
        teacher = self._distillation.teacher if plan.run.by_teacher else None
        model = teacher.model_config if teacher else self._format.model
        return dataclasses.replace(self._format, model=model, rows=len(plan.donors))

    def _exec_load_micro_batch(self, buffer_id: int) -> None:
        batch: MicroBatch = self._next_batch()
        self._load_documents(buffer_id, batch, self._plans[self._loaded])
        if self.is_first_stage():
            self.pipe_buffers["inputs"][buffer_id] = to_device(batch.tokens, self.device)
        if self.is_last_stage():
            self.pipe_buffers["labels"][buffer_id] = to_device(batch.labels, self.device)
            if self._plans[self._loaded].is_first:
                self._labels += int(count_labels(batch.labels))
        self._loaded += 1

    def set_dataiterator(self, iterator: Iterator[MicroBatch] | None) -> None:
        """Set where micro-batches come from, on every stage; DeepSpeed keeps it on the first and the last one only."""
        self.training_dataloader = None
        self.data_iterator = iterator

    def _load_documents(self, buffer_id: int, batch: MicroBatch, plan: PassPlan) -> None:
        if self.separate_documents:
            assert batch.documents is not None, "micro-batches must name the document of each position"
            rows = 1 if plan.run.by_teacher else len(plan.donors)
            self.pipe_buffers["documents"][buffer_id] = Documents.of(batch.documents, rows).to(self.device)

    def _exec_recv_activations(self, buffer_id: int) -> None:
        assert self.before is not None
        if self.separate_documents and not self.is_last_stage():  # the schedule lets only the outer stages load
            self._load_documents(buffer_id, self._next_batch(), self._plan_of(buffer_id))
        packed, plan = self.before.activations.receive(), self._plan_of(buffer_id)
        handover = self._format_of(plan).unpack(packed, plan.entering)
        for tensor in handover.tensors():
            tensor.requires_grad_()  # leaves of this stage's graph: their gradients are what goes back
        self.pipe_buffers["inputs"][buffer_id] = handover

    def _exec_forward_pass(self, buffer_id: int) -> None:
        plan = self._plan_of(buffer_id)
        inputs, documents = (self.pipe_buffers[kind][buffer_id] for kind in ("inputs", "documents"))
        if plan.run.by_teacher:
            self.pipe_buffers["outputs"][buffer_id] = self._distillation.run_teacher(inputs, documents)
            return
        objective = None
        if self.is_last_stage() and plan.run.runs_back:
            objective = self._distillation.objective(plan.run, self.pipe_buffers["labels"][buffer_id])
        with torch.set_grad_enabled(torch.is_grad_enabled() and plan.run.runs_back):
            outputs = DeepSpeedEngine.forward(
                self,
                inputs=inputs,
                donors=plan.donors,
                leaving=plan.leaving,
                documents=documents,
                objective=objective,
            )
        if self.is_last_stage():
            outputs = self._take_prediction(outputs, plan, self.pipe_buffers["labels"][buffer_id])
        self.pipe_buffers["outputs"][buffer_id] = outputs

    def _take_prediction(self, prediction: Prediction, plan: PassPlan, labels: Tensor) -> Tensor | None:
        """Keep what the last stage has predicted; returns the loss that runs back.

        Not divided by the number of labels: the weight of a token must not depend on its micro-batch. The step corrects
        for the labels of the whole batch, once they are counted.
        """
        self._distillation.take(plan.run, prediction.final, prediction.losses, labels)
        if prediction.losses is None:
            return None
        loss = prediction.losses.total * (plan.run.weight / labels.numel())
        self.fwd_outputs.append(loss.detach())
        before = self.total_loss if len(self.fwd_outputs) > 1 else None  # that of an evaluation before is still there
        self.total_loss = loss.detach() if before is None else before + loss.detach()
        return loss

    def _exec_send_activations(self, buffer_id: int) -> None:
        assert self.after is not None
        plan = self._plan_of(buffer_id)
        packed = self._format_of(plan).pack(self.pipe_buffers["outputs"][buffer_id].tensors())
        self.sent_bytes += packed.nbytes
        self.after.activations.send(packed)
        if not plan.run.runs_back:
            self.pipe_buffers["outputs"][buffer_id] = None

    def _exec_recv_grads(self, buffer_id: int) -> None:
        assert self.after is not None
        packed, plan = self.after.gradients.receive(), self._plan_of(buffer_id)
        self._gradients = self._format_of(plan).unpack(packed, plan.leaving)

    def _exec_backward_pass(self, buffer_id: int) -> None:
        self.backward_passes += 1
        last = self.pipe_buffers["micro_batch"][buffer_id] == self.micro_batches - 1
        outputs = self.pipe_buffers["outputs"][buffer_id]
        self.begin_backward(self._run_back, last)  # the last pass of a step always runs back
        self._run_back += 1
        if self.is_last_stage():
            DeepSpeedEngine.backward(self, outputs)
        else:
            assert self._gradients is not None
            self._backward_from_gradients(outputs, self._gradients)
            self._gradients = None
        self.end_backward()
        self.pipe_buffers["outputs"][buffer_id] = None

    def _backward_from_gradients(self, outputs: Handover, gradients: Handover) -> None:
        """One backward pass over all outputs, between what DeepSpeed does before and after one."""
        self._running_engine_backward = True  # keeps DeepSpeed's hooks from taking this for a user's own backward
        try:
            self._backward_prologue()
            torch.autograd.backward(outputs.tensors(), gradients.tensors())
            self._backward_epilogue()
        finally:
            self._running_engine_backward = False

    def _exec_send_grads(self, buffer_id: int) -> None:
        assert self.before is not None
        gradients = [tensor.grad for tensor in self.pipe_buffers["inputs"][buffer_id].tensors()]
        self.before.gradients.send(self._format.pack(gradients))
        self.pipe_buffers["inputs"][buffer_id] = None

    def _exec_reduce_tied_grads(self) -> None:
        self.sum_tied_gradients(self.module.get_tied_weights_and_groups())

    def _exec_reduce_grads(self) -> None:
        # One replica has nothing to reduce; but its optimizer of ZeRO-1 in fp32 takes the gradients in there.
        is_complete = self.mesh.dp_size == 1 and (self.using_bf16_optimizer or not self.zero_optimization())
        if not (self.reduces_in_backward or is_complete):
            super()._exec_reduce_grads()
        sum_partial_gradients(self.optimizer, self.stage.partial_weights(), self.mesh.tp_group)

    def _exec_optimizer_step(self, lr_kwargs: Any = None) -> None:
        bound = torch.nn.utils.get_total_norm(gradient_tensors(self.optimizer, self.module))
        norm = take_global_norm(self.optimizer)
        own_bound, *own_norm = self._read_losses([bound] if norm is None else [bound, norm])
        square, weight = self._sum_over_batch(own_bound**2)
        self._update_is_admitted = self.guard.admits(self._mean_loss, square * weight**2, self.predicted_tokens)
        if self._update_is_admitted and weight != 1.0:
            scale_gradients(self.optimizer, self.module, weight)
        with known_global_norm(self.optimizer, own_norm[0] * weight if own_norm else None):
            super()._exec_optimizer_step(lr_kwargs)

    def _read_losses(self, others: Sequence[Tensor] = ()) -> list[float]:
        """Read what this rank's losses have added up to; here the host waits for the device, once in a step.

        Args:
            others: numbers [] that are to be read with them.

        Returns:
            these numbers.
        """
        losses = [self.total_loss] if self.is_last_stage() and self.total_loss is not None else []
        numbers = numbers_of([*others, *losses, *self._distillation.sums()])
        count = len(others)
        self._own_loss = numbers[count] if losses else None
        self._own_parts = numbers[count + len(losses) :]
        return numbers[:count]

    def _sum_over_batch(self, square: float = 0.0) -> tuple[float, float]:
        """Set the mean loss, the number of labels and the counts of what all ranks have just run; collective.

        Args:
            square: anything else to be summed.

        Returns:
            its sum over all ranks, and the positions of the batch over its labels: what averages over positions must be
            multiplied by. If all labels are ignored there is nothing to average, and it is 0.
        """
        mine = [0.0, 0.0, 0.0]
        if self._own_loss is not None:
            positions = self._shape.batch * self._shape.sequence
            mine = [self._own_loss * positions, float(self._labels), float(len(self._plans) * positions)]
        distilled = self._own_parts
        sums = self.mesh.host_group.sum([square, *mine, *distilled, *self.counts_to_sum()])
        square, loss, labels, positions_of_all, *parts = sums
        self.losses_by_part = self._distillation.means(parts[: len(distilled)])
        self.summed_counts = parts[len(distilled) :]
        # Tensor-parallel ranks of the last stage hold the same labels; that cancels out but in their number.
        self.predicted_tokens = round(labels) // self.mesh.tp_size
        self._mean_loss = loss / labels if labels else math.nan
        return square, positions_of_all / labels if labels else 0.0

    def _aggregate_total_loss(self) -> Tensor:
        """The mean loss, which `train_batch` returns; the optimizer step has found it already."""
        return torch.tensor(self._mean_loss, dtype=torch.float64)

    def _reduce_outputs(self, outputs: list[Tensor], **kwargs: Any) -> list[Tensor]:
        """Leave the losses as they are: DeepSpeed would average over micro-batches, whatever their number of labels."""
        return outputs

    def _bcast_pipe_scalar(self, *args: Any, **kwargs: Any) -> Tensor:
        """The mean loss, which `eval_batch` returns; the same on all ranks."""
        self._read_losses()
        self._sum_over_batch()
        return torch.tensor(self._mean_loss, dtype=torch.float64)

    def _take_model_step(self, lr_kwargs: Any) -> None:
        if self.before_update:
            self.before_update()
        if not self._update_is_admitted:
            self._skip_model_step()
            return
        if not (self.zero_optimization() or self.bfloat16_enabled()):
            group = self.mpu.get_model_parallel_group()
            self._global_grad_norm = clip_by_global_norm(self.module, self.gradient_clipping(), group)
        super()._take_model_step(lr_kwargs)
        self.copy_tied_weights(self.module.get_tied_weights_and_groups())

    def _skip_model_step(self) -> None:
        """Do all that a step does except the update."""
        drop_gradients(self.optimizer)
        if self.zero_optimization() or self.bfloat16_enabled():
            self.optimizer.zero_grad()
        else:
            self.zero_grad()
        self._global_grad_norm = torch.tensor(torch.nan)
        self._step_applied = False
        self.lr_scheduler.step()
        self.losses = None
        self.global_steps += 1
        self.global_samples += self.train_batch_size()

    def clip_fp32_gradients(self) -> None:
        """Do nothing, they are clipped already; DeepSpeed's own takes the norm of the first stage for that of all."""

    _INSTRUCTION_MAP = PipelineEngine._INSTRUCTION_MAP | {
        schedule.LoadMicroBatch: _exec_load_micro_batch,
        schedule.RecvActivation: _exec_recv_activations,
        schedule.ForwardPass: _exec_forward_pass,
        schedule.SendActivation: _exec_send_activations,
        schedule.RecvGrad: _exec_recv_grads,
        schedule.BackwardPass: _exec_backward_pass,
        schedule.SendGrad: _exec_send_grads,
        schedule.ReduceTiedGrads: _exec_reduce_tied_grads,
        schedule.ReduceGrads: _exec_reduce_grads,
        schedule.OptimizerStep: _exec_optimizer_step,
    }


_ON_THE_WAY_BACK = (schedule.RecvGrad, schedule.BackwardPass, schedule.SendGrad)


def _repeated(micro_batches: Iterator[MicroBatch], plans: Sequence[PassPlan]) -> Iterator[MicroBatch]:
    """Each micro-batch for each of its passes."""
    batch: MicroBatch | None = None
    for plan in plans:
        batch = next(micro_batches) if plan.is_first or batch is None else batch
        yield batch


def parameter_groups(module: torch.nn.Module) -> list[dict[str, Any]]:
    """Parameter groups: matrices are decayed, norms and biases not (`weight_decay: 0` overrides the optimizer's).

    Of the parameters that are trained; a group without any is left out.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    dims = [len(getattr(p, "ds_shape", p.shape)) for p in parameters]  # ZeRO-3 may hold a flat part of it
    groups: list[dict[str, Any]] = [
        {"params": [p for p, dim in zip(parameters, dims, strict=True) if dim >= 2]},
        {"params": [p for p, dim in zip(parameters, dims, strict=True) if dim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
