"""Free space is asked before long work."""

import shutil

import pytest

from ear.errors import UserError
from ear.files.disk import require_space


def test_what_does_not_fit_is_refused_with_the_fix(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    require_space(tmp_path, free // 2, what="the images", fix="free some")
    with pytest.raises(UserError, match=r"the images need \d+\.\d GB, but .* has \d+\.\d GB left; free some\."):
        require_space(tmp_path, free * 2, what="the images", fix="free some")
