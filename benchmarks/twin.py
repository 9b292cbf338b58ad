"""The character language model again, of torch's own layers, for runs beside ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from attn_lessons.transformer import Config, to_torch_encoder_layer

Batch = tuple[np.ndarray, np.ndarray]


class Twin(nn.Module):
    """``language_model_forward`` with tied weights and no dropout, from the same parameters."""

    def __init__(self, params: Mapping[str, np.ndarray], config: Config) -> None:
        super().__init__()
        dtype = torch.from_numpy(params["embed.weight"]).dtype
        self.embed = nn.Parameter(torch.tensor(params["embed.weight"]))
        self.position = nn.Parameter(torch.tensor(params["position.weight"]))
        layer = nn.TransformerEncoderLayer(
            config.d_model,
            config.n_heads,
            config.d_ff,
            0.0,
            config.activation,
            config.eps,
            batch_first=True,
            norm_first=config.norm == "pre",
            dtype=dtype,
        )
        norm = nn.LayerNorm(config.d_model, config.eps, dtype=dtype)
        self.trunk = nn.TransformerEncoder(layer, config.n_layers, norm, enable_nested_tensor=False)
        for i, own in enumerate(self.trunk.layers):
            prefix = f"layers.{i}."
            part = {n.removeprefix(prefix): p for n, p in params.items() if n.startswith(prefix)}
            state = to_torch_encoder_layer(part)
            own.load_state_dict({n: torch.from_numpy(np.array(p)) for n, p in state.items()})
        ends = {n.removeprefix("norm."): p for n, p in params.items() if n.startswith("norm.")}
        norm_state = {n: torch.from_numpy(np.array(p)) for n, p in ends.items()}
        self.trunk.norm.load_state_dict(norm_state)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        n = tokens.shape[1]
        hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
        return self.trunk(self.embed[tokens] + self.position[:n], mask=hidden) @ self.embed.T


def optimizer_of(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with decay on the projections' matrices alone."""
    named = list(model.named_parameters())
    decayed = [p for n, p in named if p.ndim >= 2 and n not in ("embed", "position")]
    others = [p for n, p in named if p.ndim < 2 or n in ("embed", "position")]
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
    )


def stepper(
    params: Mapping[str, np.ndarray],
    config: Config,
    draw: Callable[[], Batch],
    schedule: Callable[[int], float],
    *,
    weight_decay: float,
    max_norm: float,
) -> tuple[Twin, Callable[[], float]]:
    """The model and its next training step, which returns the loss before it."""
    model: Any = Twin(params, config)
    optimizer = optimizer_of(model, weight_decay)
    taken = 0

    def step() -> float:
        nonlocal taken
        taken += 1
        for group in optimizer.param_groups:
            group["lr"] = schedule(taken)
        inputs, targets = (torch.from_numpy(a) for a in draw())
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        return loss.item()

    return model, step
