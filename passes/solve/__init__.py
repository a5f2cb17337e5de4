"""From a Problem to a Solution. To read in this order:

`problem` (the data), `brute` (the oracle), `ilp` (the answer), `search` (its rounds); then what
they use: `presolve`, `dominance`, `reduction` (smaller problems), `messages`, `chains`, `buckets`
(lower bounds), `eliminate`, `restrict` (good and exact choices), `memory`, `prices`, `cuts` (limits
that bind), `exact` (OR-tools), `meter` (effort), `tables` (shared arrays). Of large problems
`large` makes small ones first, with `ascent` (prices), `trees` (better choices), `flat` and
`kernels` (arrays and compiled loops). Problems come from `iopddl` files and, for tests, from
`samples`.
"""
