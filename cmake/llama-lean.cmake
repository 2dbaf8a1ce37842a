# Given to llama-cpp-python's build as CMAKE_PROJECT_INCLUDE. Its CMakeLists forces the cache entry
# LLAMA_BUILD_COMMON on; a normal variable of that name still wins (CMP0077, CMP0126), and nothing
# that edgedistill calls lives in llama.cpp's "common" library.
set(LLAMA_BUILD_COMMON OFF)
