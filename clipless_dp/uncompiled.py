"""Functions that ``torch.compile`` leaves as they are, at no cost where nothing is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch._C._dynamo import eval_frame
from torch._compile import _disable_dynamo

_Function = TypeVar("_Function", bound=Callable[..., Any])

WHY = (
    "what keeps the books of privacy runs as it is: compile the model, or a function of the model and its loss; around "
    "zero_grad, accumulate and step leave fullgraph=True out"
)


def uncompiled(function: _Function) -> _Function:
    """The same function, which compilers do not record, nor what it calls: graphs break around it.

    What ``torch.compiler.disable`` makes is another function around it, which takes microseconds in each call; it is
    taken where a version of torch does not have what is needed for less.
    """
    try:
        skip = eval_frame._FrameAction.SKIP
        eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))
    except AttributeError:
        return cast(_Function, _disable_dynamo(function))
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = WHY  # type: ignore[attr-defined]
    return function
