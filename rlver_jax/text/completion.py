"""A script by which bash completes `rlver`: commands, their flags, fields of a config, files, and words of a choice.

The script holds every word itself, so that a completion starts no Python.
"""

from collections.abc import Iterable, Mapping

from absl import flags

# Readline takes a word from its last = or : on, so what comes before is cut off again.
_SCRIPT = r"""# Completion of rlver in bash, as `rlver completion bash` prints it. To install it, or after an upgrade:
#   mkdir -p ~/.local/share/bash-completion/completions
#   rlver completion bash > ~/.local/share/bash-completion/completions/rlver
_rlver_words() {  # those of $1 that begin like $2
  COMPREPLY=($(compgen -W "$1" -- "$2"))
  [[ ${COMPREPLY[0]} != *[=.] ]] || compopt -o nospace
}

_rlver_files() {  # files that begin like $1, and those of the words $2
  local IFS=$'\n' before=${1%"${1##*[=:]}"}
  COMPREPLY=($({ compgen -f -- "$1"; compgen -W "$2" -- "$1"; } | sort -u))
  COMPREPLY=("${COMPREPLY[@]#"$before"}")
  compopt -o filenames
}

_rlver() {
  local word=${COMP_LINE:0:COMP_POINT}
  word=${word##*[[:space:]]}
  local value=${word#*=} fields='@fields@'
  COMPREPLY=()
  if ((COMP_CWORD == 1)); then
    _rlver_words '@commands@ completion --help --version' "$word"
    return
  fi
  case "${COMP_WORDS[1]} $word" in
    'completion '*) _rlver_words bash "$word" ;;
@values@
    *' -'*=*) ;;
@flags@
    *) _rlver_files "$word" '' ;;
  esac
}

complete -F _rlver rlver
"""


def bash_script(
    commands: Mapping[str, flags.FlagValues], fields: Iterable[str], configs: Iterable[str], path_parser: type
) -> str:
    """The script.

    Args:
        commands: with the flags that they define.
        fields: of a config, as a.b.
        configs: files that --config takes besides those in the working folder.
        path_parser: class of the parsers of flags that take a path.
    """
    values, names = [], []
    for command, defined in commands.items():
        for flag in sorted(defined):
            parser = defined[flag].parser
            if isinstance(parser, flags.EnumParser):
                words = " ".join(parser.enum_values)
                values.append(f"    '{command} --{flag}='*) _rlver_words '{words}' \"$value\" ;;")
            elif flag == "config" or isinstance(parser, path_parser):
                words = "\n".join(configs) if flag == "config" else ""
                values.append(f"    '{command} --{flag}='*) _rlver_files \"$value\" '{words}' ;;")
        if "config" in defined:
            names.append(f'    \'{command} --config.\'*) _rlver_words "$fields" "$word" ;;')
        names.append(f"    '{command} -'*) _rlver_words '{' '.join(_words(defined))}' \"$word\" ;;")
    texts = {"commands": " ".join(commands), "values": "\n".join(values), "flags": "\n".join(names)}
    texts["fields"] = " ".join(f"--config.{field}=" for field in fields)
    script = _SCRIPT
    for name, text in texts.items():
        script = script.replace(f"@{name}@", text)
    return script


def _words(defined: flags.FlagValues) -> list[str]:
    """Flags as they are typed: --name= where a value follows."""
    known = [name for name in sorted(defined) if defined[name].help and name not in ("flagfile", "undefok")]
    return [f"--{name}" + "=" * (not defined[name].boolean) for name in known] + ["--config."] * ("config" in known)
