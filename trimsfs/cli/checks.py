"""How a check of ``trimsfs doctor`` that is not simply well ends."""


class ProblemError(Exception):
    """A check that failed: what is wrong and what to do."""


class Advice(Exception):  # noqa: N818 - not an error
    """A check that passed, though something could be better."""
