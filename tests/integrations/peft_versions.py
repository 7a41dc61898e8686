"""Marks of tests that need other versions of PEFT or transformers than the oldest that the package works with."""

import peft
import pytest
import transformers
from packaging.version import Version

_MINIMUM = transformers.integrations.peft.MIN_PEFT_VERSION

#: For the adapters that a transformers model adds itself.
transformers_takes_peft = pytest.mark.skipif(
    Version(peft.__version__) < Version(_MINIMUM),
    reason=f"transformers {transformers.__version__} adds adapters with PEFT {_MINIMUM} or newer",
)
#: Before, PEFT's own layers recompile after a hotswap.
since_020 = pytest.mark.skipif(Version(peft.__version__) < Version("0.20"), reason="needs PEFT 0.20")
