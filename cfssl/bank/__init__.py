"""The offline store of real images and their counterfactuals: built once, memory-mapped ever after."""
