_base_ = "mmdet::_base_/default_runtime.py"

# In stage 1 the spatial interaction branch is idle and gets no gradient: DDP has to know.
find_unused_parameters = True
