"""`rcb regress`: results of declared subsets held against golden files, so that changed behaviour is seen and named.

What is held exactly, because it is the same on every CPU: which documents were asked and what they contain, the tokens
of every prompt, counts of views and native tokens, the scores of answers that did not change, and the aggregated
metrics where no answer changed. Floating-point sums differ in their last bits between CPUs and thread counts, so these
have a stated tolerance:

- Kept sets: exact, but for tokens whose score lay near the cut (`kept.NEAR_COSINE`, `kept.NEAR_ATTENTION`) when the
  golden file was made. The file lists them. Counts may differ by as many of them as flipped.
- Thresholds: within `compare.THRESHOLD`.
- Answers: as many may change as a binomial test allows at the declared rate of flips and `alpha`.
- Scores: what changed answers did to them must not be significant at `alpha` (McNemar's exact test where scores are 0
  and 1, otherwise the exact permutation test).
"""
