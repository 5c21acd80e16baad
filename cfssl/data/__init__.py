"""From images and attributes on disk to tables that are read without decoding."""
