"""GPUs faked on machines without any, in a test's process and in those that it starts.

They show wrong calls, wrong pinning and wrong recovery; nothing about numbers, memory or speed of a GPU.
"""
