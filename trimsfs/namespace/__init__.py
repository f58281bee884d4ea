"""Names: directories and their listings, inodes, generations, and who may read what."""
