"""What goes wrong with a plan."""


class PlanError(Exception):
    """The load, the calibration or this machine is not what a plan can be made of; the text says why."""
