"""Watch a process for its training, and attach a recorder to it.

The first module that is called to be trained is the model: in training mode, with gradients, and
with parameters of its own that are trained. Its inputs are collected before its forward pass runs;
once there are enough, it is recorded. The optimizer that holds its parameters counts the steps;
where none does by the second forward pass, changes of its weights are steps.

Nothing here raises into the training: what goes wrong is told in a line, and the script runs on.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_modules
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from sonde.exceptions import InvalidInputError
from sonde.hooks import Probe, Recorder
from sonde.hooks.config.config import Config
from sonde.hooks.losses.scores import OutputChoiceError
from sonde.hooks.model.layers import unwrap
from sonde.hooks.model.taps import add_hook
from sonde.hooks.recording.environment import process_rank
from sonde.hooks.training.hand_steps import HandSteps
from sonde.hooks.training.optimizer_steps import StepCalls
from sonde.sizes import size_text

from .bounds import bounded
from .config import LaunchConfig
from .first_batches import FirstBatches
from .run_path import launch_key, reserve, waited_for
from .run_script import Launch, tell
from .survey import Survey, survey, why_no_probe
from .trained_outside import trained_outside

_MAX_EXAMPLES = 256
# Fewer examples say little of a layer; but the first steps are not waited away for them.
_ENOUGH_EXAMPLES = 16
_MAX_STEPS_WAITED = 8
_NO_HOOKS = "which run no hooks; nothing sees its passes unless it calls the module itself"


class Watch:
    """Waits for a training in this process, records it, and leaves nothing else behind.

    Args:
        launch: What was launched.

    Raises:
        SondeError: If what is to be recorded has no meaning.
    """

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._config = LaunchConfig(launch)
        self._pid = os.getpid()
        self._batches = FirstBatches(self._config.num_first or _MAX_EXAMPLES)
        self._root: nn.Module | None = None
        self._recorder: Recorder | None = None
        self._optimizer: torch.optim.Optimizer | None = None  # It is stepping.
        self._step_calls = StepCalls()
        self._hand_steps: HandSteps | None = None
        self._no_probe: str | None = None
        self._survey: Survey | None = None
        self._left_out: list[str] = []
        self._stepped_before: list[torch.optim.Optimizer] = []  # Before any module was called.
        self._has_eval_calls = False
        self._num_steps = 0
        self._is_attached = False
        self._is_over = False
        self._is_busy = False
        self._root_hook: Callable[[], None] | None = None
        # Only what a module's own table names is given arguments by name, so that the first of two
        # hooks enters the second one there.
        self._find = torch_modules.register_module_forward_pre_hook(self._on_any_call)
        self._take = torch_modules.register_module_forward_pre_hook(self._on_found)
        self._before = register_optimizer_step_pre_hook(self._before_step)
        self._after = register_optimizer_step_post_hook(self._after_step)
        _warn_of_no_hook_of_ours()

    def finish(self, reason: str) -> None:
        """Close the log at the end of the script, and say what became of it."""
        if os.getpid() != self._pid:
            return
        self._guarded(self._finish, reason)

    def _finish(self, reason: str) -> None:
        recorder = self._recorder
        if recorder is None:
            if not self._is_over:
                tell(f"nothing was recorded: {self._why_nothing()}")
            self._stop()
            return
        if self._hand_steps is not None and self._hand_steps.has_stepped():
            recorder.step()
        if not recorder.num_steps:
            tell("no step was counted: no optimizer held the parameters of the model it recorded")
        self._stop()
        recorder.close(reason)

    def _why_nothing(self) -> str:
        if self._root is None and self._has_eval_calls:
            return "the modules that were called were in eval mode; call model.train()"
        if self._root is None and self._stepped_before:
            return f"the training calls methods such as `forward`, {_NO_HOOKS}"
        if self._root is None:
            return "no module was trained in this process"
        return (
            f"the training ended after {self._batches.num_examples} examples; "
            "ask for fewer by --examples"
        )

    def _on_any_call(self, module: nn.Module, _: Any) -> None:
        """Note a module that is called to be trained; the outermost one is called first."""
        if self._is_busy or _is_traced():
            return
        if self._is_over or self._root is not None or os.getpid() != self._pid:
            return
        if not torch.is_grad_enabled():
            return
        if not module.training:
            self._has_eval_calls = True
            return
        if not any(parameter.requires_grad for parameter in module.parameters()):
            return
        if isinstance(module, torch.jit.ScriptModule):
            self._guarded(unwrap, module)  # It says why not.
            return
        module._forward_pre_hooks_with_kwargs[self._take.id] = True

    def _on_found(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        if kwargs is None:
            return
        del module._forward_pre_hooks_with_kwargs[self._take.id]
        self._guarded(self._begin, module, args, kwargs)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A graph that is compiled from here on must not have these hooks in it.
        self._find.remove()
        self._take.remove()
        self._root = module
        self._model = unwrap(_single(module))
        if not self._has_eval_calls and any(map(self._holds, self._stepped_before)):
            name = type(self._model).__name__
            raise InvalidInputError(f"the training calls methods of {name}, {_NO_HOOKS}")
        self._root_hook = add_hook(module, self._before_forward, is_before=True)
        self._on_call(module, args, kwargs)

    def _before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if _is_traced():
            return
        if module is self._root and module.training and torch.is_grad_enabled():
            self._guarded(self._on_call, module, args, kwargs)

    def _on_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Do what there is to do before a forward pass of the model."""
        known = set(module._forward_pre_hooks)
        has_changed = self._hand_steps is not None and self._hand_steps.has_stepped()
        is_within = self._optimizer is not None and self._holds(self._optimizer)
        if has_changed and not is_within:
            self._count_hand_step()
        # In the midst of a step that evaluates its closure again, weights are those of no step.
        if self._recorder is None and self._has_enough(args, kwargs):
            if not (has_changed and is_within):
                self._record()
        if self._hand_steps is None and not self._is_attached:
            self._hand_steps = HandSteps(self._model)
        # The hooks of this call are listed already: what was added since, it would leave out.
        for key, hook in list(module._forward_pre_hooks.items()):
            if key not in known:
                hook(module, args, kwargs)
        if self._is_attached and self._root_hook is not None:
            self._after.remove()
            self._root_hook()
            self._root_hook = None

    def _has_enough(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Take the inputs of a call, and tell whether recording can begin.

        Raises:
            InvalidInputError: If they make no probe, and what is to be measured needs one.
        """
        if any(isinstance(p, nn.UninitializedParameter) for p in self._model.parameters()):
            return False
        if self._survey is None:
            self._survey = survey(self._model, args, kwargs)
            self._batches.batch_dim = self._survey.batch_dim
        if not self._config.needs_first or self._no_probe is not None:
            return True
        try:
            self._batches.add(self._model, args, kwargs)
        except InvalidInputError as error:
            if not self._config.chooses:
                raise
            self._no_probe = str(error)
            return True
        enough = self._config.num_first or _ENOUGH_EXAMPLES
        is_late = self._config.num_first is None and self._num_steps >= _MAX_STEPS_WAITED
        has_two = self._batches.num_examples > 1
        is_enough = self._batches.num_examples >= enough
        return is_enough or (has_two and (is_late or self._batches.is_all))

    def _record(self) -> None:
        rank, num_ranks = process_rank(os.environ)
        needs_probe = self._config.needs_first and self._no_probe is None
        probe = self._batches.probe(rank) if needs_probe else None
        if probe is not None and self._config.chooses:
            self._no_probe = why_no_probe(self._model, probe)
            probe = probe if self._no_probe is None else None
        others: dict[str, Any] = {}
        if num_ranks > 1:
            others["options"] = {"config": {"launch": launch_key(os.environ)}}
        path = Path("runs") / self._launch.name
        if not self._config.has_path:
            path = reserve(path) if rank == 0 else waited_for(path, launch_key(os.environ))
        try:
            config = self._config.make(path, probe, **others)
            recorder = self._recorder_of(config)
        except BaseException:
            if not self._config.has_path and rank == 0 and not any(path.iterdir()):
                path.rmdir()
            raise
        self._recorder = recorder
        if rank == 0:
            self._tell_of(recorder, probe)
        if self._num_steps:
            state = {"version": 1, "num_steps": self._num_steps, "num_epochs": 0}
            recorder.load_state_dict(state)
        recorder.start()
        if self._optimizer is not None and self._holds(self._optimizer):
            self._attach(self._optimizer)  # It runs this forward pass in its closure.

    def _recorder_of(self, config: Config) -> Recorder:
        """Make the recorder; where nothing says what is measured, without what cannot be.

        Raises:
            OutputChoiceError: If a file asks for what cannot be measured.
        """
        if self._config.chooses:
            assert self._survey is not None  # It is made before examples are collected.
            bounds, self._left_out = bounded(
                config,
                self._model,
                self._survey.num_calls,
                batch_dim=self._survey.batch_dim,
                store=self._config.store,
            )
        else:
            bounds = config
        try:
            return bounds.recorder(self._model)
        except OutputChoiceError as error:
            if not self._config.chooses:
                raise
            tell(f"what is made of the model's outputs is left out: {error}")
            return bounds.without_outputs().recorder(self._model)

    def _attach(self, optimizer: torch.optim.Optimizer) -> None:
        assert self._recorder is not None
        self._recorder.attach(optimizer)
        self._is_attached, self._hand_steps = True, None
        outside = trained_outside(self._model, optimizer)
        if outside is not None:
            tell(outside)
            self._recorder.note_missed(outside)

    def _tell_of(self, recorder: Recorder, probe: Probe | None) -> None:
        name = type(self._model).__name__
        line = f"recording {name} into {recorder.path}"
        if probe is not None:
            line += f", on {probe.num_examples} examples of the first batches"
        elif self._no_probe is not None:
            line += f", in band: {self._no_probe}"
        num_bytes = recorder.estimate().step_bytes
        if probe is not None:  # In band the batches decide it.
            line += f", {size_text(num_bytes)} a step"
        if self._left_out:
            line += f"; left out: {', '.join(self._left_out)}"
            recorder.note_missed(f"left out: {', '.join(self._left_out)}")
        if self._num_steps:
            line += f"; from step {self._num_steps} on, as these came late"
        tell(line)

    def _count_hand_step(self) -> None:
        if self._recorder is None:
            self._num_steps += 1
        else:
            self._recorder.step()

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._is_over or torch.compiler.is_compiling() or os.getpid() != self._pid:
            return
        self._guarded(self._on_step, optimizer)

    def _on_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._is_attached or not self._step_calls.enter():
            return
        self._optimizer = optimizer
        if self._root is None or not self._holds(optimizer):
            return
        if self._recorder is not None:
            self._attach(optimizer)  # In time for the hooks of this very step.

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._is_over or torch.compiler.is_compiling() or os.getpid() != self._pid:
            return
        self._guarded(self._on_stepped, optimizer)

    def _on_stepped(self, optimizer: torch.optim.Optimizer) -> None:
        has_ended = self._step_calls.leave()
        if has_ended:
            self._optimizer = None
        if self._root is None and all(optimizer is not one for one in self._stepped_before):
            self._stepped_before.append(optimizer)
        if self._is_attached:
            self._before.remove()
            return
        if (
            has_ended
            and self._root is not None
            and self._recorder is None
            and self._holds(optimizer)
        ):
            self._num_steps += 1
            self._hand_steps = None

    def _holds(self, optimizer: torch.optim.Optimizer) -> bool:
        own = {id(parameter) for parameter in self._model.parameters()}
        return any(id(p) in own for group in optimizer.param_groups for p in group["params"])

    def _guarded(self, function: Callable[..., Any], *args: Any) -> None:
        """Call a function, and let the script run bare where that fails."""
        if self._is_busy or self._is_over:
            return
        self._is_busy = True
        try:
            function(*args)
        except Exception as error:  # Training is sacred: whatever fails here must not end it.
            self._stop()
            what = "the recording ends" if self._recorder is not None else "nothing is recorded"
            tell(f"{what}, the script runs on: {error or type(error).__name__}")
            if self._recorder is not None:
                self._recorder.close(f"an error of sonde: {type(error).__name__}")
        finally:
            self._is_busy = False

    def _stop(self) -> None:
        self._is_over = True
        for handle in (self._find, self._take):
            handle.remove()
        if self._root_hook is not None:
            self._root_hook()
            self._root_hook = None


def _is_traced() -> bool:
    """Tell whether a graph is being made of what runs, which must have nothing of ours in it."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def _single(module: nn.Module) -> nn.Module:
    """Return what DataParallel calls directly, where it has no second device to copy it to."""
    if isinstance(module, nn.DataParallel) and len(module.device_ids) < 2:
        inner: nn.Module = module.module
        return inner
    return module


def _warn_of_no_hook_of_ours() -> None:
    """Spare compiled modules a warning of hooks that fire twice: ours are gone by then."""
    has_any = torch_modules._has_any_global_hook

    def has_others() -> bool:
        tables = (
            torch_modules._global_backward_pre_hooks,
            torch_modules._global_backward_hooks,
            torch_modules._global_forward_hooks,
        )
        hooks = torch_modules._global_forward_pre_hooks.values()
        is_others = any(not isinstance(getattr(h, "__self__", None), Watch) for h in hooks)
        return any(tables) or is_others

    if has_any.__module__ == torch_modules.__name__:
        torch_modules._has_any_global_hook = has_others
