"""The exam of a golden bundle: what another chip recorded, replayed on this one."""
