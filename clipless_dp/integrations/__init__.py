"""Training loops of other libraries, each in a module of its own, which imports that library.

:mod:`clipless_dp.integrations.huggingface` needs ``pip install 'clipless-dp[huggingface]'``;
:mod:`clipless_dp.integrations.lightning` works with whichever Lightning is installed, and imports none. What estimators
share is in :mod:`clipless_dp.integrations.scikit_learn`.
"""
