"""Quiet for the tests: no progress bars and tables of transformers, which are not ours."""

import transformers

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
