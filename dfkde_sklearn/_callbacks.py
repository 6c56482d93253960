"""scikit-learn's callbacks, such as progress bars across a search, where it has them: from version 1.9 on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

try:
    from sklearn.callback import CallbackSupportMixin, with_callbacks

    # The calls that `one_task` puts around a method, for the `stacklevel` of warnings.
    N_CALLS = 2
except ImportError:
    N_CALLS = 1

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """Stands for the one of later versions."""

    def with_callbacks(method: Callable[..., Any]) -> Callable[..., Any]:
        """Return the method."""
        return method


def one_task(fit: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method of fitting tell callbacks when it begins and ends: it is one task.

    Parameters
    ----------
    fit : callable
        A method of an estimator with `CallbackSupportMixin`, of X, y and keywords.

    Returns
    -------
    callable
        The method with its callbacks.
    """

    @with_callbacks
    @functools.wraps(fit)
    def with_hooks(self: Any, X: Any, y: Any = None, **keywords: Any) -> Any:
        if not hasattr(self, "_init_callback_context"):
            return fit(self, X, y, **keywords)
        context = self._init_callback_context()
        context.call_on_fit_task_begin(estimator=self, X=X, y=y, metadata=keywords)
        result = fit(self, X, y, **keywords)
        context.call_on_fit_task_end(estimator=self, X=X, y=y, metadata=keywords, reconstruction_attributes={})
        return result

    return with_hooks
