from smlib.folders import settle_libraries

settle_libraries()
