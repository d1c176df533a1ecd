"""The command ``sib-lab``; rooms below are imported inside the commands, so that ``--help`` answers at once."""

INSTALL = 'sib-lab needs {missing}, which is not installed: pip install "sib-ext[lab]"'
