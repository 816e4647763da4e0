"""Server rules beyond ``torch.optim``: each an ordinary optimizer, each with its source."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from baffle.errors import ConfigError
from baffle.rules import STATE, Rule, RuleName, RuleState


class RAdaZO(torch.optim.Optimizer):
    """Adam whose second moment is that of the *momentum*: v ← β₂v + (1 − β₂)m² (R-AdaZO).

    A zeroth-order gradient is mostly noise of equal size in every coordinate, so Adam's v is flat and
    adapts nothing; the momentum has averaged that noise, so its square still shows which coordinates
    carry signal. Shu et al., "Refining Adaptive Zeroth-Order Optimization at Ease", arXiv:2502.01014.
    Theirs has no bias correction; here both moments have Adam's, m before it is squared, so that the
    first steps are of the same size as the later ones. State: 2n numbers and a step count.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
    ) -> None:
        if not (lr > 0 and 0 <= betas[0] < 1 and 0 <= betas[1] < 1 and eps > 0):
            raise ConfigError(f"RAdaZO: lr {lr}, betas {betas}, eps {eps}: lr, eps > 0 and betas in [0, 1)")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state: dict[str, Any] = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    state["momentum"] = torch.zeros_like(parameter)
                    state["square"] = torch.zeros_like(parameter)
                state["step"] += 1
                t = float(state["step"])
                m = state["momentum"].mul_(beta1).add_(parameter.grad, alpha=1 - beta1)
                mean = m / (1 - beta1**t)
                v = state["square"].mul_(beta2).addcmul_(mean, mean, value=1 - beta2)
                root = (v / (1 - beta2**t)).sqrt_().add_(group["eps"])
                parameter.addcdiv_(mean, root, value=-group["lr"])
        return loss


class Portable(torch.optim.Optimizer):
    """SGD, SGD with momentum or Adam as a ``Rule``: steps that a client without torch repeats bit for bit.

    ``rule`` is "sgd", "momentum" (β₁ of ``betas``) or "adam". Schedulers change the group's ``lr`` and
    ``betas`` as they do of any optimizer. Equal to its twin in ``torch.optim`` to float32 rounding; it is an
    optimizer of its own because torch's last bits differ between builds and processors.

    Takes contiguous float32 parameters on the CPU, in one group, each with a gradient. Raises ConfigError
    for others. State: n numbers for momentum, 2n for Adam, and a step count.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        rule: RuleName = "adam",
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "rule": rule}
        _rule_of(defaults, 0.0)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.param_groups:
            raise ConfigError("a portable rule is one for all parameters: one group")
        super().add_param_group(param_group)
        for parameter in self.param_groups[0]["params"]:
            fits = parameter.dtype == torch.float32 and parameter.device.type == "cpu"
            if not (fits and parameter.is_contiguous()):
                raise ConfigError("a portable rule takes contiguous float32 parameters on the CPU")

    def rule(self, clip: float = 0.0) -> Rule:
        """What ``step`` does if it is called now: ask before the scheduler goes on."""
        return _rule_of(self.param_groups[0], clip)

    def rule_state(self) -> RuleState:
        """What the rule remembers, as rows (n,) over all parameters in order. Cost: a copy."""
        parameters, names = self.param_groups[0]["params"], STATE[self.rule().name]
        if not self.state:
            return self.rule().fresh(sum(parameter.numel() for parameter in parameters))
        states = [self.state[parameter] for parameter in parameters]
        rows = {name: torch.cat([state[name].view(-1) for state in states]).numpy() for name in names}
        return RuleState(int(states[0]["step"]), rows)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ConfigError for the state of another rule."""
        wanted, rules = self.rule().name, [group.get("rule") for group in state_dict["param_groups"]]
        if rules != [wanted]:
            raise ConfigError(f"this state is one of the rule {rules[:1]}, not of {wanted}")
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        rule, parameters = self.rule(), self.param_groups[0]["params"]
        gradients = [parameter.grad for parameter in parameters]
        if any(gradient is None for gradient in gradients):
            raise ConfigError("a portable rule steps all parameters at once: one has no gradient")
        # Entries do not mix: the rule on each parameter is the rule on all of them as one row.
        for parameter, gradient in zip(parameters, gradients, strict=True):
            state: dict[str, Any] = self.state[parameter]
            if not state:
                state["step"] = 0
                state.update({name: torch.zeros_like(parameter) for name in STATE[rule.name]})
            state["step"] += 1
            rows = {name: _row(state[name]) for name in STATE[rule.name]}
            rule.advance(_row(parameter), rows, _row(gradient), state["step"])
        return loss


def _rule_of(group: dict[str, Any], clip: float) -> Rule:
    name, (beta1, beta2) = cast(RuleName, group["rule"]), group["betas"]
    if name == "adam":
        return Rule(name, float(group["lr"]), float(beta1), float(beta2), float(group["eps"]), clip)
    return Rule(name, float(group["lr"]), float(beta1) if name == "momentum" else 0.0, clip=clip)


def _row(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A view (n,)."""
    row: np.ndarray[Any, np.dtype[np.float32]] = tensor.detach().view(-1).numpy()
    return row
