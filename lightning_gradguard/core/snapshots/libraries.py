"""Folders with code that is not the user's."""

from __future__ import annotations

import os
import site
import sysconfig

import torch

TORCH = os.path.dirname(torch.__file__)
#: Those of installed packages and of the standard library.
LIBRARIES = (*site.getsitepackages(), site.getusersitepackages(), sysconfig.get_paths()["stdlib"])
