"""Registration of the ops with torch, so that eager, autocast, compile, export and CUDA graphs see each as one op."""

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["register"]


class _Op:
    """What `torch.library.custom_op` makes, without its import of the compiler, a second, at the first call."""

    def __init__(self, name: str, body: Callable[..., Any]) -> None:
        self.name = name
        schema = torch.library.infer_schema(body, mutates_args=())
        torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(name, "CompositeExplicitAutograd", body)
        namespace, op = name.split("::")
        self.call = getattr(getattr(torch.ops, namespace), op).default

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)

    def register_fake(self, function: Callable[..., Any]) -> None:
        """The function that makes outputs of the right shape, dtype and strides, with nothing in them."""
        torch.library.register_fake(self.name, function)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """The gradient, and what is kept for it."""
        torch.library.register_autograd(self.name, backward, setup_context=setup_context)


def register(name: str) -> Callable[[Callable[..., Any]], _Op]:
    """Register the decorated function as an op that changes none of its arguments.

    Args:
        name: "namespace::op". Its schema comes from the function's annotations.
    """
    return lambda body: _Op(name, body)
