"""The methods MOTH is compared with (Section V-B), one file each, called as `moth.harden`."""
