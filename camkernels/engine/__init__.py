"""The second-order engine: a network as scheduled passes over its convolutions.

Three rooms: ``trace`` finds the operations; ``plan`` divides them into stages, with ``keep`` and
``choose`` for what is kept and what is made again; ``passes`` runs them, by ``units`` and
``conv_norm``. ``function`` shows the passes to autograd, ``forward`` stands in the place of the
network's own, ``ledger`` and ``report`` tell what a step will take.
"""

from camkernels.engine.choose import BudgetError
from camkernels.engine.forward import EngineError, EngineForward, install
from camkernels.engine.gradients import input_gradients
from camkernels.engine.report import PlanReport, plan_report, predict_peak

__all__ = [
    "BudgetError",
    "EngineError",
    "EngineForward",
    "PlanReport",
    "input_gradients",
    "install",
    "plan_report",
    "predict_peak",
]
