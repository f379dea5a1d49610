#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# fetch_debian_headers.sh PACKAGE FOLDER: unpacks a Debian or Ubuntu package into FOLDER, from the machine's own mirror: from its own
# suite, else from a newer one. Installs nothing and changes nothing of the system: apt runs on lists and caches of its own in FOLDER.
# Called by CMake's Find modules. Exit 1 with a line where there is no apt or no such package.
set -eu
package=$1
folder=$2
fail() { echo "$*" >&2; exit 1; }
command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || fail "no apt on this machine"
. /etc/os-release
case $ID in
  debian) suites="$VERSION_CODENAME trixie forky sid"; components=main ;;
  ubuntu) suites="$VERSION_CODENAME plucky questing"; components="main universe" ;;
  *) fail "$ID is not Debian or Ubuntu" ;;
esac
mirror=$(apt-get indextargets --format '$(CODENAME) $(RELEASE) $(REPO_URI)' 2>/dev/null |
  awk -v suite="$VERSION_CODENAME" '$1 == suite || $2 == suite {print $NF; exit}')
[ -n "$mirror" ] || fail "apt's configuration names no mirror for $VERSION_CODENAME"

mkdir -p "$folder/apt/lists/partial" "$folder/apt/cache/archives/partial"
folder=$(cd "$folder" && pwd)
apt() {
  apt-get -qq -o Dir::Etc::SourceList="$folder/apt/sources.list" -o Dir::Etc::SourceParts=/dev/null \
    -o Dir::State::Lists="$folder/apt/lists" -o Dir::Cache="$folder/apt/cache" \
    -o APT::Sandbox::User="" -o Debug::NoLocking=1 "$@"
}
for suite in $suites; do
  echo "deb $mirror $suite $components" >"$folder/apt/sources.list"
  apt update >"$folder/apt/log" 2>&1 || continue
  (cd "$folder/apt" && apt download "$package" >>"$folder/apt/log" 2>&1) || continue
  dpkg-deb -x "$folder/apt/$package"_*.deb "$folder"
  rm -rf "$folder/apt"
  echo "$package from $suite"
  exit 0
done
fail "$package is in none of: $suites (see $folder/apt/log)"
