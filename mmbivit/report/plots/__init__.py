"""The pictures of ``tools/analysis_tools/plot.py``, from configs, checkpoints and work dirs to figures."""
