"""The workbench of sib_ext: data, networks, training, explanations and measures, behind the command ``sib-lab``."""
