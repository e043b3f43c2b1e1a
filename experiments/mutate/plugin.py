"""A plugin of pytest that imports one module of the library from another source.

The environment variable `JAXBP_MUTANT` names a JSON file with the name of the module and its
source. No file of the library is changed.
"""

import importlib.abc
import importlib.util
import json
import os
import sys
from pathlib import Path


class MutantLoader(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Finds and loads one module from a given source."""

    def __init__(self, module: str, source: str, path: str):
        """Takes the module's full name, the source, and the path of its file, for tracebacks."""
        self.module, self.source, self.path = module, source, path

    def find_spec(self, fullname, path=None, target=None):
        """Finds this module and no other."""
        del path, target
        if fullname != self.module:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)

    def get_source(self, fullname):
        """The source with the mistake."""
        del fullname
        return self.source

    def get_filename(self, fullname):
        """The path of the file that the module usually comes from."""
        del fullname
        return self.path


# Pytest imports this plugin before anything that imports the library.
mutant = json.loads(Path(os.environ["JAXBP_MUTANT"]).read_text(encoding="utf-8"))
sys.meta_path.insert(0, MutantLoader(**mutant))
