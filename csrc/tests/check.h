// A test program: TEST(name) { CHECK(...); } and one main. No framework, so that the sanitizers see nothing else.
#pragma once

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

namespace fusedcomm::test {

struct Test {
  const char* name;
  void (*body)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

struct Registration {
  Registration(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

// Ends the program: a failed check in a thread that plays a rank would leave the others waiting.
[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
  std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
  std::fflush(stderr);
  std::_Exit(1);
}

inline int run_tests() {
  for (const Test& test : tests()) {
    const auto start = std::chrono::steady_clock::now();
    test.body();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("ok   %-60s %6.2f s\n", test.name, seconds.count());
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace fusedcomm::test

#define TEST(name)                                                                \
  static void name();                                                             \
  static const ::fusedcomm::test::Registration registration_##name(#name, &name); \
  static void name()

#define CHECK(condition)                                                                   \
  do {                                                                                     \
    if (!(condition)) ::fusedcomm::test::fail(__FILE__, __LINE__, "expected " #condition); \
  } while (false)

// CHECK with more to say: CHECK_THAT(a == b, "row " << row);
#define CHECK_THAT(condition, message)                         \
  do {                                                         \
    if (!(condition)) {                                        \
      std::ostringstream text;                                 \
      text << "expected " #condition ": " << message;          \
      ::fusedcomm::test::fail(__FILE__, __LINE__, text.str()); \
    }                                                          \
  } while (false)
