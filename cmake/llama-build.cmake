# Given to llama-cpp-python's build as CMAKE_PROJECT_INCLUDE. Its CMakeLists forces the cache entry
# LLAMA_BUILD_COMMON on; a normal variable of that name still wins (CMP0077, CMP0126), and nothing
# that edgedistill calls lives in llama.cpp's "common" library.
set(LLAMA_BUILD_COMMON OFF)

# Beside every C++ file, since CMake knows no way into another project's single file.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    add_compile_options(
        "$<$<COMPILE_LANGUAGE:CXX>:SHELL:-include \"${CMAKE_CURRENT_LIST_DIR}/amx_tile_config.h\">")
endif()
