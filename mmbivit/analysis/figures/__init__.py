"""Pictures of what a network does: functions that return matplotlib figures."""
