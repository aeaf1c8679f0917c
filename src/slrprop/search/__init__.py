"""Which layer gets which method and rank under a budget: few real evaluations, then a promise checked on other data.

1. Every layer's candidates (method, rank) get a predicted damage: the relative error of the layer's output on calibration
   inputs, times the layer's sensitivity (the divergence of the network's output from the original per unit of that
   error, measured once per layer with only that layer compressed).
2. The candidates on the convex hull of (bytes, damage) form one path from the original to the smallest network:
   at each step the layer that saves the most bytes per damage moves on.
3. Bisection along the path with real evaluations finds the smallest network in the budget, on a third of the search part of the
   data, which nothing was fitted to.
4. Where layers are calibrated, what is evaluated is the plan fitted in order, each layer on the outputs of those before it
   (at the level ``tuned`` also distilled), and some evaluations go to choices between two points of the path.
5. The result is measured on the check part, which nothing before has seen. Where it fails there, the search steps back, and every
   further look makes the interval wider. At the end of the way back stands the original.
"""

from slrprop.search.compress import compress
from slrprop.search.path import LEVELS, QUICK, Candidate, Point, hull
from slrprop.search.result import Budget, BudgetError, Compression

__all__ = ["LEVELS", "QUICK", "Budget", "BudgetError", "Candidate", "Compression", "Point", "compress", "hull"]
