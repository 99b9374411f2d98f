"""The content of files: manifest, codecs, safetensors I/O, sharding, inspection. Specified in FORMAT.md."""
