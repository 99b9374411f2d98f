"""What lies in a file: manifest, codecs, safetensors I/O, sharding, inspection. Specified in FORMAT.md."""
